"""What a library must hold that others build on: numbers, threads, memory, wrong use."""
