"""Trainers: how a node turns the global model and its own data into a fine-tune (step 0).

Each module holds one `fedmerge.training.Trainer`; `fedmerge.training.TRAINERS` names them.
"""
