"""What a model did with a clip and a question, measured once and shown in three ways.

collect   runs the model and gathers the numbers
report    one HTML file that needs nothing else
figures   the pictures as PNG and SVG, with matplotlib
"""
