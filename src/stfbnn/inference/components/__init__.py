"""The components of a mixture: where they start, how they are retrained and weighted, and what is told of them."""
