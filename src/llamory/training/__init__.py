"""Training on the Hugging Face Trainer: LLARA, retrievers, FoT memory, instruction tuning, dictionary look-up."""
