"""Pretraining of robot state tokenizers and policies: recipes, streaming shards, exact resumption, Slurm."""

__version__ = "0.1.0"
