"""What a run will take, known before it is paid for: memory, operations, time, dollars."""
