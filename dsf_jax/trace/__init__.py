"""A model's layers, the order of its data flow, and their Gram matrices."""
