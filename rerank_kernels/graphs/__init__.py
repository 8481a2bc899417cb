"""CUDA graphs of packed forwards: captured once per bucket of tokens and sequences, then replayed. No model is known here."""
