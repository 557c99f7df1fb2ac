"""What both GPU backends share: validated structures, and the plans that kernels read."""
