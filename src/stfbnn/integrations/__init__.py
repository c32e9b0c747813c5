"""Stage two inside of other people's training loops: `stfbnn.integrations.lightning` and `stfbnn.integrations.transformers`."""
