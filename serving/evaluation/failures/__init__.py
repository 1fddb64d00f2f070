"""Failure analysis: three probes per failed prompt, a rule over their outcomes, and the decision card.

No judge: (1) the gold passage as the only context, (2) a grammar or a repaired text, (3) the likelihood of the gold
answer against other rows' without any context. What they say is `classify.py`, what to do about it `advice.py`.
"""
