"""Models for others: a checkpoint as a folder that other programs read, with a card that says where it comes from."""
