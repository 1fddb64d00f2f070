"""A second engine behind `Engine`: vLLM's AsyncLLM, for tensor parallelism and bases that outgrow one GPU.

Written against vLLM 0.29.0 (extra `vllm`), whose AsyncLLM is no stable interface: the version is pinned. vLLM itself is
imported in `engine` alone, when an engine is made; `translate` has plain functions of plain data.
"""
