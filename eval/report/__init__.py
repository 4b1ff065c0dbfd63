"""What a result folder is shown as: one page, its pictures and tables; needs records alone."""
