"""Prompts into answers: a file of prompts, decoding in batches, a file of answers that a killed run goes on with."""
