"""Post-hoc EMA in the trainers of others: a callback for Lightning, and one for Hugging Face's Trainer."""
