"""Process that floods an endpoint in `benchmarks.prompt_flood`, without imports that would take CPU meanwhile.

python -m benchmarks.flooder PORT MODEL BYTES      until its stdin ends; then prints the seconds of each answer
"""

import json
import socket
import sys
import threading
import time

CONNECTIONS = 2
TEXT = "Which airport has the code ZPPP and how high does it lie above the sea level? "


def flood(port: int, body: bytes, ended: threading.Event, took: list[float]) -> None:
    """Send one prompt after the other over one connection; each is refused for its length."""
    head = "POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
    request = f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body
    with socket.create_connection(("127.0.0.1", port)) as connection:
        while not ended.is_set():
            began = time.perf_counter()
            connection.sendall(request)
            answer = connection.recv(65_536)
            while not answer.endswith(b"}}"):  # the error's JSON; head and body may come apart
                answer += connection.recv(65_536)
            assert answer.startswith(b"HTTP/1.1 400"), answer[:500]
            assert b"context_length_exceeded" in answer, answer[:500]
            took.append(time.perf_counter() - began)


def main() -> None:
    port, model, size = int(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    text = (TEXT * (size // len(TEXT) + 1))[:size]
    body = json.dumps({"model": model, "messages": [{"role": "user", "content": text}], "max_tokens": 1}).encode()
    ended, took = threading.Event(), list[float]()
    threads = [threading.Thread(target=flood, args=(port, body, ended, took)) for _ in range(CONNECTIONS)]
    for thread in threads:
        thread.start()
    sys.stdin.read()
    ended.set()
    for thread in threads:
        thread.join()
    print(json.dumps(took))


if __name__ == "__main__":
    main()
