"""How the shipped reference model is made: text, recipes, training, judging, export, card.

Run from the checkout (`python -m reference_training.train`); no install of saap holds it. What a
user needs at run time, the files and the sequences that the demo draws, is `saap.eval.reference`.
"""
