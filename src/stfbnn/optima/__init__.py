"""The loss as a function of one layer's weights, all others frozen: its optima, the paths between them, their widths."""
