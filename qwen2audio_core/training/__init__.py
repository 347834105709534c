"""Training in the three stages of the published model: pretraining, fine-tuning, preference.

    jsonl --data--> batches --model, losses--> one number --loop--> weights --checkpoint--> disk

There is one loop. The stages differ by what data.py puts into a batch and by the loss alone.
"""
