"""Prompts with answers that a program can check, for reinforcement learning."""
