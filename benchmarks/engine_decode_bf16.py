"""`engine_decode` with the base and all adapters in bf16, which is what `dtype: auto` takes where a CPU has AMX.

python -m benchmarks.engine_decode_bf16
"""

from benchmarks.engine_decode import main

if __name__ == "__main__":
    main("bfloat16", at=(32,))
