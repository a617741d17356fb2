"""Where the trainer meets the machine: files, ranks, the clock, logs."""
