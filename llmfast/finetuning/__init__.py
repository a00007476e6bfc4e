"""Fine-tuning: a task's data and loss, handed to the one training loop."""
