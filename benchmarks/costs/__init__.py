"""What the package costs and saves, in ratios within one process, beside what others take: `make bench`."""
