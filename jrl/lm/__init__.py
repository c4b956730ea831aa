"""Language models: their parts, and tasks with verifiers to train them on."""
