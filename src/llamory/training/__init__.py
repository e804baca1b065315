"""Training: each method as a thin recipe on the Hugging Face Trainer."""
