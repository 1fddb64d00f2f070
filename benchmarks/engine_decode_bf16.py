"""`engine_decode` with the base and all adapters in bf16, which is what `dtype: auto` takes where a CPU has AMX.

python -m benchmarks.engine_decode_bf16
"""

from benchmarks import engine_decode


def main() -> None:
    engine_decode.main("bfloat16", at=(32,))


if __name__ == "__main__":
    main()
