"""What the operators and networks cost beside their peers.

One script for each operator, ``networks`` for whole networks, ``run`` for all of them (what
``make benchmark`` calls); ``common`` is what they share, ``common/goals.py`` what they are held to.
"""
