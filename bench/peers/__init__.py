"""What benchmarks compare with: other libraries' operators and trainers, and physical floors."""
