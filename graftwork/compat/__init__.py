"""Names of other libraries that those libraries do not promise to keep: one function or class per hook.

No other module of the product imports or reaches a private name of another library (tests/rules/test_private_names.py).
Each docstring names the upstream name and the versions that the hook was checked with; tests/unit/compat fails when
upstream changes a name, a signature or the behaviour that a hook depends on.
"""
