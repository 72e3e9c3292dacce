"""Fits a line to a few points by gradient descent, and logs each epoch's error to MLflow."""

import argparse

import mlflow

POINTS = [(x / 10, 3 * x / 10 + 2) for x in range(20)]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rate", type=float, required=True)
    parser.add_argument("--epochs", type=int, required=True)
    arguments = parser.parse_args()

    slope = offset = 0.0
    # The run that was started for this command: MLFLOW_RUN_ID names it.
    with mlflow.start_run():
        for epoch in range(arguments.epochs):
            errors = [(slope * x + offset - y, x) for x, y in POINTS]
            slope -= arguments.rate * 2 * sum(error * x for error, x in errors) / len(POINTS)
            offset -= arguments.rate * 2 * sum(error for error, _ in errors) / len(POINTS)
            loss = sum(error * error for error, _ in errors) / len(POINTS)
            mlflow.log_metric("loss", loss, step=epoch)
        mlflow.log_metrics({"slope": slope, "offset": offset})
    print(f"slope {slope:.2f}, offset {offset:.2f} after {arguments.epochs} epochs, loss {loss:.4f}")


if __name__ == "__main__":
    main()
