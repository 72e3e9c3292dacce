"""What any program needs; knows neither Prefect nor MLflow."""
