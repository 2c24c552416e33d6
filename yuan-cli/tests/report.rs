//! The HTML report of a run: every number is in the metrics file, and a browser shows it well.

mod support;

use std::{
    env, fs,
    path::{Path, PathBuf},
    process::Command,
};

use serde_json::Value;
use support::{succeed, tiny_pretrain, write_corpus};
use tempfile::tempdir;

/// A run that prunes in two rounds, both of which stay, or in one that the guard undoes.
fn guarded_run(directory: &Path, stays: bool) -> PathBuf {
    let (data, run) = (directory.join("data"), directory.join("run"));
    write_corpus(&data);
    let mut command = tiny_pretrain(&data, &run);
    command.args(["--aux-loss", "1e-3"]);
    if stays {
        // Beside the prune at step 12.
        command.args(["--prune-at", "18", "--guard", "1.0", "--guard-steps", "3"]);
    } else {
        // Half of the load goes, and is to be made up for in one step.
        command.args(["--guard", "0.0", "--guard-steps", "1"]);
    }
    let (out, err) = succeed(&mut command);
    if stays {
        assert_eq!(err.matches("the prune stays").count(), 2, "{err}");
        assert!(out.contains("after prune 2"), "{out}");
    } else {
        assert!(err.contains("back to step 12, before the prune"), "{err}");
        assert!(out.contains("Nothing was pruned: the guard undid the prune"), "{out}");
    }
    run
}

/// The value of an attribute of an opening tag.
fn attribute<'a>(tag: &'a str, name: &str) -> Option<&'a str> {
    let start = tag.find(&format!(" {name}=\""))? + name.len() + 3;
    tag[start..].split('"').next()
}

/// The number that a text like "21.25 M", "3.2 %" or "4.357" shows, and the size of its last digit.
fn shown(text: &str) -> (f64, f64) {
    let (digits, scale) = match text.split_once(' ') {
        Some((digits, "M")) => (digits, 1e6),
        Some((digits, "%")) => (digits, 0.01),
        None => (text, 1.0),
        Some(_) => panic!("{text:?} is no number"),
    };
    let decimals = digits.split_once('.').map_or(0, |(_, decimals)| decimals.len() as i32);
    (digits.parse::<f64>().unwrap() * scale, scale * 10_f64.powi(-decimals))
}

/// Median of tokens per second over the steps of every stage, from the JSON lines alone.
fn median_speeds(lines: &[Value]) -> Vec<f64> {
    // What lies between a prune and the roll-back that undid it never was.
    let mut lasting: Vec<&Value> = Vec::new();
    for line in lines {
        if line["event"] == "roll_back" {
            let prune = lasting.iter().rposition(|line| line["event"] == "prune").unwrap();
            lasting.truncate(prune);
        } else {
            lasting.push(line);
        }
    }
    let stages = lasting.split(|line| line["event"] == "prune");
    stages
        .map(|stage| {
            let steps = stage.iter().filter(|line| line["event"] == "step");
            let mut speeds: Vec<f64> = steps
                .map(|step| step["tokens"].as_f64().unwrap() / step["seconds"].as_f64().unwrap())
                .collect();
            speeds.sort_by(f64::total_cmp);
            speeds[speeds.len() / 2]
        })
        .collect()
}

#[test]
fn every_number_of_the_report_is_in_the_metrics_file() {
    for stays in [true, false] {
        let directory = tempdir().unwrap();
        check_numbers(&guarded_run(directory.path(), stays));
    }
}

fn check_numbers(run: &Path) {
    let html = fs::read_to_string(run.join("report.html")).unwrap();
    let lines: Vec<Value> = fs::read_to_string(run.join("metrics.jsonl"))
        .unwrap()
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect();
    let speeds = median_speeds(&lines);
    let mut checked = 0;
    for element in html.split("<data").skip(1) {
        let (tag, rest) = element.split_once('>').unwrap();
        let text = rest.split_once('<').unwrap().0;
        let value: f64 = attribute(tag, "value").unwrap().parse().unwrap();
        let expected = match attribute(tag, "data-pointer") {
            Some(pointer) => {
                let line: usize = attribute(tag, "data-line").unwrap().parse().unwrap();
                lines[line - 1].pointer(pointer).and_then(Value::as_f64).unwrap()
            }
            None => match attribute(tag, "data-derived").unwrap() {
                "gain in median speed" => speeds.last().unwrap() / speeds[0],
                how => {
                    speeds[how
                        .strip_prefix("median speed of stage ")
                        .unwrap()
                        .parse::<usize>()
                        .unwrap()]
                }
            },
        };
        assert!((value - expected).abs() <= 1e-12 * expected.abs(), "{tag}: {value} {expected}");
        let (shown, digit) = shown(text);
        assert!((shown - value).abs() <= 0.501 * digit, "{text} shows {value}");
        checked += 1;
    }
    assert!(checked > 50, "{checked} numbers");
    // Every cell of a table is numbers of that kind, a dash, or the name of its row.
    for cell in html.split("<td>").skip(1) {
        let mut cell = cell.split_once("</td>").unwrap().0.to_owned();
        while let Some(start) = cell.find("<data") {
            let end = start + cell[start..].find("</data>").unwrap() + "</data>".len();
            cell.replace_range(start..end, "");
        }
        let is_layer = cell.parse::<usize>().is_ok_and(|layer| layer < 2);
        assert!(is_layer || !cell.contains(|c: char| c.is_ascii_digit()), "{cell}");
    }
    // So is every number in a sentence; pictures and headings are drawn from the same events.
    let mut bare = html.split_once("<body>").unwrap().1.to_owned();
    for (from, to) in [
        ("<svg", "</svg>"),
        ("<data", "</data>"),
        ("<th>", "</th>"),
        ("<h2>", "</h2>"),
        ("<td>", "</td>"),
    ] {
        while let Some(start) = bare.find(from) {
            let end = start + bare[start..].find(to).unwrap() + to.len();
            bare.replace_range(start..end, "");
        }
    }
    let text: String =
        bare.split('<').filter_map(|part| part.split_once('>')).map(|(_, text)| text).collect();
    let text = text.replace("up to 16 experts", "");
    assert!(!text.contains(|c: char| c.is_ascii_digit()), "{text}");
    assert!(
        !html.contains("<script") && !html.contains("<link") && !html.contains("url("),
        "self-contained"
    );
}

/// Chromium, where it is installed; CI installs it and sets `YUAN_BROWSER=required`.
fn browser() -> Option<PathBuf> {
    let names = ["chromium", "chromium-browser", "google-chrome", "chrome"];
    let path = env::var_os("PATH").unwrap_or_default();
    let found = env::split_paths(&path)
        .flat_map(|folder| names.map(|name| folder.join(name)))
        .find(|candidate| candidate.is_file());
    if found.is_none() {
        assert!(
            env::var_os("YUAN_BROWSER").is_none_or(|value| value != "required"),
            "no Chromium on the PATH"
        );
        eprintln!("skipped: no Chromium on the PATH");
    }
    found
}

/// Loads the report in frames of several widths and writes what it measures into the page.
const LOOK: &str = r#"<!doctype html><body style="margin:0">
<iframe src="report.html" width="1280" height="900"></iframe>
<iframe src="report.html" width="390" height="844"></iframe>
<pre id="found"></pre>
<script>
const luminance = (css) => {
  const [r, g, b] = css.match(/[\d.]+/g).slice(0, 3).map((x) => {
    const c = x / 255;
    return c <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4;
  });
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
};
const contrast = (a, b) => {
  const [x, y] = [luminance(a), luminance(b)];
  return (Math.max(x, y) + 0.05) / (Math.min(x, y) + 0.05);
};
window.onload = () => {
  const frames = [...document.querySelectorAll("iframe")].map((frame) => {
    const page = frame.contentDocument, root = page.documentElement, view = frame.contentWindow;
    const page_colour = view.getComputedStyle(page.body).backgroundColor;
    const svgs = [...page.querySelectorAll("svg")];
    return {
      width: root.clientWidth,
      scroll: root.scrollWidth,
      page: luminance(page_colour),
      text: contrast(view.getComputedStyle(page.body).color, page_colour),
      pictures: svgs.map((svg) => svg.getBoundingClientRect().height),
      axis: svgs.map((svg) => contrast(view.getComputedStyle(svg.querySelector("text")).fill, view.getComputedStyle(svg.querySelector("rect")).fill)),
      tables: page.querySelectorAll("table").length,
      font: parseFloat(view.getComputedStyle(page.body).fontSize),
    };
  });
  document.getElementById("found").textContent = JSON.stringify(frames);
};
</script>"#;

#[test]
fn a_browser_shows_the_report_well_at_any_width_by_day_and_by_night() {
    let Some(browser) = browser() else { return };
    let directory = tempdir().unwrap();
    let run = guarded_run(directory.path(), true);
    let look = run.join("look.html");
    fs::write(&look, LOOK).unwrap();
    for (dark, scheme) in [(false, 1), (true, 0)] {
        let mut command = Command::new(&browser);
        command.args([
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--allow-file-access-from-files",
        ]);
        command.arg(format!("--user-data-dir={}", directory.path().join("profile").display()));
        command.arg(format!("--blink-settings=preferredColorScheme={scheme}"));
        command
            .args(["--virtual-time-budget=10000", "--dump-dom"])
            .arg(format!("file://{}", look.display()));
        let (dom, _) = succeed(&mut command);
        let found = dom.split_once("<pre id=\"found\">").unwrap().1.split_once("</pre>").unwrap().0;
        let frames: Vec<Value> = serde_json::from_str(found).unwrap_or_else(|_| panic!("{found}"));
        for (frame, width) in frames.iter().zip([1280.0, 390.0]) {
            let number = |key: &str| frame[key].as_f64().unwrap();
            assert!(number("width") <= width && number("width") > width - 20.0, "{frame}");
            assert!(
                number("scroll") <= number("width"),
                "the page itself never scrolls sideways: {frame}"
            );
            assert!(number("text") > 7.0, "{frame}");
            assert!((number("page") < 0.05) == dark, "{frame}");
            let pictures = frame["pictures"].as_array().unwrap();
            assert!(
                pictures.len() >= 5
                    && pictures.iter().all(|height| height.as_f64().unwrap() > 150.0),
                "{frame}"
            );
            let axis = frame["axis"].as_array().unwrap();
            assert!(axis.iter().all(|contrast| contrast.as_f64().unwrap() > 4.5), "{frame}");
            assert!(number("tables") >= 4.0 && number("font") >= 14.0, "{frame}");
        }
    }
}
