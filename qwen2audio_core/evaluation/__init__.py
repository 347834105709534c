"""Answers to the rows of a file, and how right they are by the published rules.

    file --manifest.read--> items --harness.ask--> answers --tasks.score--> a Score of each source

normalize says which words two texts are compared in, metrics counts, tasks knows which of that goes
with which prompt. Extra: eval.
"""
