"""What a step spends its time and memory on."""
