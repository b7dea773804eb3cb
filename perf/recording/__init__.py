"""What is kept: the columns of result rows, the CSV files of them, and where they come from."""
