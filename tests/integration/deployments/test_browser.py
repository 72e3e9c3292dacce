"""The form of a deployment, the run and its artifact, as people see them: in Chromium, on the embedded server's own UI."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.services.waiting import wait_for

from prefect_mlprojects import deploy
from prefect_mlprojects.server.access import login_link

from .conftest import started

Call = Callable[..., Any]

_FLAGS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--window-size=1200,1500",
)


class Page:
    """A browser window."""

    def __init__(self, driver: Any, screenshots: Path | None) -> None:
        self.driver = driver
        self._screenshots = screenshots

    def text(self) -> str:
        from selenium.common.exceptions import WebDriverException

        try:
            return str(self.driver.find_element("tag name", "body").text)
        except WebDriverException:
            # The page was drawn anew in the middle.
            return ""

    def shows(self, *words: str, seconds: float = 60) -> None:
        wait_for(lambda: all(word in self.text() for word in words), f"{words} on the page: {self.text()}", seconds)

    def field(self, label: str) -> Any:
        """The input under a label of the form."""
        path = (
            f"//span[contains(@class,'schema-form-property__label') and starts-with(normalize-space(), '{label}')]"
            "/ancestor::div[contains(concat(' ', @class, ' '), ' schema-form-property ')][1]//*[self::input or self::textarea]"
        )
        return self.driver.find_element("xpath", path)

    def fill(self, label: str, value: str) -> None:
        from selenium.webdriver.common.keys import Keys

        field = self.field(label)
        field.send_keys(Keys.CONTROL, "a")
        field.send_keys(Keys.DELETE)
        field.send_keys(value)

    def press(self, button: str) -> None:
        path = f"//button[normalize-space()='{button}']"
        element = wait_for(lambda: self.driver.find_elements("xpath", path), f"the button {button}")[-1]
        self.driver.execute_script("arguments[0].scrollIntoView({block: 'center'})", element)
        element.click()

    def keep(self, name: str) -> None:
        """Keeps a picture for the documentation, when a folder for it is named."""
        if self._screenshots is not None:
            time.sleep(1)
            self.driver.save_screenshot(str(self._screenshots / f"{name}.png"))


@pytest.fixture
def page(tmp_path: Path, need_program: Callable[[str], str]) -> Iterator[Page]:
    chromium, driver_path = need_program("chromium"), need_program("chromedriver")
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in (*_FLAGS, f"--user-data-dir={tmp_path / 'chromium'}"):
        options.add_argument(flag)
    driver = webdriver.Chrome(options=options, service=Service(driver_path))
    folder = os.environ.get("MLPROJECTS_SCREENSHOTS")
    yield Page(driver, Path(folder) if folder else None)
    driver.quit()


def test_form_in_the_browser_starts_a_run(
    page: Page, project: Path, pool: str, prefect_server: Any, tmp_path: Path, call: Call
) -> None:
    made = deploy(project, work_pool=pool, env_manager="local")
    assert made.url is not None
    page.driver.get(login_link(f"{made.url}/run"))
    page.shows(
        "Parameters of main",
        "count (Optional)",
        "word (Optional)",
        "needed",
        "Environment manager (Optional)",
        "Extra parameters",
    )

    # Each parameter with its type and default; zero and empty show as they are.
    assert (page.field("count").get_attribute("type"), page.field("count").get_attribute("value")) == ("number", "0")
    assert (page.field("needed").get_attribute("type"), page.field("needed").get_attribute("value")) == ("number", "")
    assert page.field("word").get_attribute("value") == ""
    assert "needed (Optional)" not in page.text()
    page.keep("deployment-form")

    # A wrong value is refused.
    page.fill("needed", "2.5")
    page.fill("count", "1.5")
    page.press("Submit")
    page.shows("integer")
    assert page.driver.current_url.endswith("/run")
    page.keep("deployment-form-refused")

    # A right one runs.
    page.fill("count", "3")
    with started("worker", "--pool", pool, log=tmp_path / "worker.log"):
        page.press("Submit")
        run = wait_for(lambda: _runs(call, made.name), "the flow run")[0]
        page.driver.get(f"{prefect_server.ui_url}/runs/flow-run/{run.id}")
        wait_for(lambda: call("read_flow_run", run.id).state.is_completed(), "the run's end")
        page.shows("Completed", "got 3 ", "execute", "validate-params", f"{made.name}/main")
        page.keep("flow-run")
        page.driver.get(f"{prefect_server.ui_url}/artifacts/key/{made.name}-main")
        page.shows(f"Run of {made.name}/main")
        artifact = call("read_artifacts", artifact_filter=_of_flow_run(run.id), limit=1)[0]
        page.driver.get(f"{prefect_server.ui_url}/artifacts/artifact/{artifact.id}")
        page.shows("FINISHED", "needed", "2.5")
        page.keep("run-artifact")


def test_form_has_a_field_for_each_kind_of_parameter(page: Page, pool: str) -> None:
    made = deploy(Path(__file__).parents[3] / "examples" / "parameters", work_pool=pool, env_manager="local")
    assert made.url is not None
    page.driver.get(login_link(f"{made.url}/run"))
    page.shows("Parameters of main", "rounds (Optional)", "verbose (Optional)")
    # The descriptions are the help of the fields; limits are told with them.
    page.shows(
        "How often the data is seen (from 1 to 100)",
        "The kind of model.",
        "Whether the rows are shuffled.",
        "Print each round.",
    )
    number = page.field("rounds")
    assert (number.get_attribute("type"), number.get_attribute("value")) == ("number", "10")
    switch = page.field("shuffle")
    assert (switch.get_attribute("type"), switch.is_selected()) == ("checkbox", True)
    assert not page.field("verbose").is_selected()
    page.shows("tree", "linear", "boosted", "Sizes of the layers.", "Add item")
    page.keep("deployment-form-parameters")

    # What is no number of the range is refused by the server.
    page.fill("rounds", "101")
    page.press("Submit")
    page.shows("100")
    assert page.driver.current_url.endswith("/run")


def test_cancelling_in_the_browser_ends_the_work(
    page: Page, project: Path, pool: str, prefect_server: Any, tmp_path: Path, call: Call
) -> None:
    made = deploy(project, "sleep", work_pool=pool, env_manager="local")
    with started("worker", "--pool", pool, log=tmp_path / "worker.log"):
        run = made.run()
        wait_for(lambda: "sleeping 23" in (tmp_path / "worker.log").read_text(), "the command")
        page.driver.get(login_link(f"{prefect_server.ui_url}/runs/flow-run/{run.flow_run_id}"))
        page.shows("Running")
        page.press("Cancel")
        page.press("Confirm")
        assert not run.wait()
        assert run.get_status() == "KILLED"
        page.shows("Cancelled")


def _of_flow_run(flow_run_id: Any) -> Any:
    from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterFlowRunId

    return ArtifactFilter(flow_run_id=ArtifactFilterFlowRunId(any_=[flow_run_id]))


def _runs(call: Call, deployment: str) -> list[Any]:
    from prefect.client.schemas.filters import DeploymentFilter, DeploymentFilterName

    found: list[Any] = call(
        "read_flow_runs", deployment_filter=DeploymentFilter(name=DeploymentFilterName(any_=[deployment]))
    )
    return found
