"""Trains an elastic net on scikit-learn's bundled diabetes data and logs it to MLflow."""

import argparse

import mlflow
from sklearn.datasets import load_diabetes
from sklearn.linear_model import ElasticNet
from sklearn.metrics import mean_absolute_error, r2_score, root_mean_squared_error
from sklearn.model_selection import train_test_split


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--alpha", type=float, default=0.1)
    parser.add_argument("--l1-ratio", type=float, default=0.5)
    parser.add_argument("--test-fraction", type=float, default=0.25)
    parser.add_argument("--seed", type=int, default=42)
    options = parser.parse_args()

    features, target = load_diabetes(return_X_y=True, as_frame=True)
    train_x, test_x, train_y, test_y = train_test_split(
        features, target, test_size=options.test_fraction, random_state=options.seed
    )
    # Under a project run MLFLOW_RUN_ID is set, and this goes on with the run that was made for it.
    with mlflow.start_run():
        model = ElasticNet(alpha=options.alpha, l1_ratio=options.l1_ratio, random_state=options.seed)
        model.fit(train_x, train_y)
        predicted = model.predict(test_x)
        metrics = {
            "rmse": float(root_mean_squared_error(test_y, predicted)),
            "mae": float(mean_absolute_error(test_y, predicted)),
            "r2": float(r2_score(test_y, predicted)),
        }
        mlflow.log_metrics(metrics)
    print(f"Elastic net (alpha={options.alpha:g}, l1_ratio={options.l1_ratio:g})")
    for name, value in metrics.items():
        print(f"  {name}: {value:.4f}")


if __name__ == "__main__":
    main()
