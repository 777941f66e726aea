"""Data processing, part by part: what optimized_data_processing.py runs."""
