//! Images through the program: tuning on pages, questions about them, and the ways of weights that see.

mod support;

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
    sync::OnceLock,
};

use serde_json::{Value, json};
use support::{fail, succeed, tiny_pretrain, write_corpus, yuan};
use tempfile::{TempDir, tempdir};
use yuan::{
    model::{YuanConfig, vision::ImageConfig},
    report::Answer,
    train::{LaepConfig, NewRun, Run, TrainConfig, Trigger, data::PageFiles},
};

/// Pages of one colour each, and what is asked about them.
fn write_pages(directory: &Path) -> PathBuf {
    fs::create_dir_all(directory).unwrap();
    let mut lines = String::new();
    for number in 0..40_u8 {
        let name = format!("{number}.png");
        let page = image::GrayImage::from_pixel(40, 28, image::Luma([number * 6]));
        page.save(directory.join(&name)).unwrap();
        let answer = if number < 20 { "It is dark." } else { "It is bright." };
        let line = json!({"image": name, "prompt": "How is the page?", "response": answer});
        lines += &format!("{line}\n");
    }
    let file = directory.join("pages.jsonl");
    fs::write(&file, lines).unwrap();
    file
}

/// Pages, and a run that saw them; made once for all tests.
fn made() -> &'static (TempDir, PathBuf, PathBuf) {
    static MADE: OnceLock<(TempDir, PathBuf, PathBuf)> = OnceLock::new();
    MADE.get_or_init(|| {
        let directory = tempdir().unwrap();
        let pages = write_pages(&directory.path().join("pages"));
        let run = directory.path().join("run");
        let config = TrainConfig {
            steps: 2,
            batch_size: 2,
            seq_len: 64,
            laep: LaepConfig { trigger: Trigger::Never, window_steps: 1, ..LaepConfig::default() },
            ..TrainConfig::default()
        };
        let model = YuanConfig { images: Some(ImageConfig::tiny(3)), ..YuanConfig::tiny(300) };
        let files = PageFiles::new(vec![pages.clone()], 0.2);
        let made = Run::create(&run, NewRun::new(config, model, files)).unwrap();
        let device = yuan::device("flex").unwrap().autodiff();
        made.trainer(&device).unwrap().run().unwrap();
        (directory, pages, run)
    })
}

fn command(name: &str, arguments: &[&Path]) -> Command {
    let mut command = yuan(name);
    command.args(arguments);
    command
}

/// What a model says about pages, always its likeliest.
fn answer(model: &Path, pages: &[&str], question: &str) -> String {
    let (_, data, _) = made();
    let mut command = command("generate", &[model]);
    command.args([question, "--temperature", "0", "--max-new-tokens", "12"]);
    for page in pages {
        command.arg("--image").arg(data.with_file_name(page));
    }
    succeed(&mut command).0
}

#[test]
fn a_model_is_tuned_on_pages_and_asked_about_them() {
    let (directory, data, run) = made();
    let tuned = directory.path().join("tuned");
    let mut tuning = command("finetune", &[run]);
    tuning.arg("--data").arg(data).arg("--run").arg(&tuned);
    tuning.args(["--steps", "30", "--batch", "4", "--seq", "64", "--learning-rate", "0.003"]);
    tuning.args(["--validation", "0.2", "--validate-every", "30", "--min-experts", "2"]);
    let (_, notes) = succeed(&mut tuning);
    assert!(notes.contains("questions about") && notes.contains("images to train on"), "{notes}");
    assert!(tuned.join("report.html").is_file());

    // A question is not shown again; what follows it is.
    let said = answer(&tuned, &["3.png"], "How is the page?");
    assert!(said.starts_with("It is"), "{said}");
    let two = answer(&tuned, &["3.png", "30.png"], "How is the page?");
    assert!(!two.trim().is_empty());
    // Two questions about the same page, together.
    let mut both = command("generate", &[&tuned]);
    both.args(["How is the page?", "How is it?", "--temperature", "0", "--max-new-tokens", "12"]);
    both.arg("--image").arg(data.with_file_name("3.png"));
    let (out, _) = succeed(&mut both);
    let first = format!("> How is the page?\n{}", said.trim_end());
    assert!(out.starts_with(&first) && out.contains("> How is it?\n"), "{out} {said}");

    // The projector alone.
    let frozen = directory.path().join("frozen");
    let mut tuning = command("finetune", &[run]);
    tuning.arg("--data").arg(data).arg("--run").arg(&frozen);
    tuning.args(["--steps", "2", "--batch", "2", "--seq", "64", "--freeze", "vision,language"]);
    tuning.args(["--image-positions", "increasing"]);
    succeed(tuning.args(["--validation", "0.2", "--validate-every", "2"]));
    let settings = fs::read_to_string(frozen.join("data/pages.json")).unwrap();
    assert!(settings.contains("\"positions\": \"increasing\""), "{settings}");
    answer(&frozen, &["3.png"], "How is the page?");
    // The rule comes along: into another run that goes on from it, and into a copy of the weights.
    let [again, exported] = ["again", "copied"].map(|name| directory.path().join(name));
    let mut tuning = command("finetune", &[&frozen]);
    tuning.arg("--data").arg(data).arg("--run").arg(&again);
    tuning.args(["--steps", "2", "--batch", "2", "--seq", "64", "--validation", "0.2"]);
    succeed(&mut tuning);
    let settings = fs::read_to_string(again.join("data/pages.json")).unwrap();
    assert!(settings.contains("\"positions\": \"increasing\""), "{settings}");
    succeed(&mut command("convert", &[&again, &exported]));
    let config = fs::read_to_string(exported.join("config.json")).unwrap();
    assert!(config.contains("\"image_positions\": \"increasing\""), "{config}");
    // Text alone has nothing to teach a frozen language model.
    let chat = data.with_file_name("chat.jsonl");
    let line = json!({"prompt": "How is it?", "response": "It is dark."});
    fs::write(&chat, format!("{line}\n").repeat(60)).unwrap();
    let mut tuning = command("finetune", &[run]);
    tuning.arg("--data").arg(&chat).arg("--run").arg(directory.path().join("nothing"));
    tuning.args(["--steps", "2", "--batch", "2", "--seq", "64", "--freeze", "language"]);
    let error = fail(&mut tuning);
    assert!(error.contains("nothing learns: the language model is frozen"), "{error}");
}

/// A template that knows parts of a message, and one that knows text alone.
#[test]
fn a_chat_about_an_image_is_the_question_that_its_template_writes() {
    let (directory, data, run) = made();
    let parts = "{% for p in m.content %}{% if p.type == 'image' %}<IMAGE></IMAGE>{% else %}\
                 {{ p.text }}{% endif %}{% endfor %}";
    for (name, content) in [("parts", parts), ("text", "{{ m.content }}")] {
        let model = directory.path().join(name);
        support::copy_directory(run, &model);
        let template =
            format!("<BOS>{{% for m in messages %}}{content}<|Assistant|>{{% endfor %}}");
        fs::write(model.join("chat_template.jinja"), template).unwrap();
        let mut chat = command("generate", &[&model]);
        chat.args(["How is the page?", "--chat", "--temperature", "0", "--max-new-tokens", "12"]);
        chat.arg("--image").arg(data.with_file_name("9.png"));
        assert_eq!(succeed(&mut chat).0, answer(run, &["9.png"], "How is the page?"), "{name}");
    }
    // What looks like a marker in a question is text.
    answer(run, &["9.png"], "What is <pad> and </IMAGE>?");
}

#[test]
fn weights_that_see_are_inspected_converted_and_pruned() {
    let (directory, _, run) = made();
    let [exported, half, pruned, plan, loads] =
        ["exported", "half", "pruned", "plan.json", "loads.json"].map(|n| directory.path().join(n));
    succeed(&mut command("convert", &[run, &exported]));
    let inventory = |model: &Path| -> Value {
        let (out, _) = succeed(command("inspect", &[model]).arg("--json"));
        serde_json::from_str(&out).unwrap()
    };
    assert_eq!(inventory(&exported)["parameters"], inventory(run)["parameters"]);
    assert_eq!(inventory(&exported)["problems"], json!([]));
    let config: Value =
        serde_json::from_slice(&fs::read(exported.join("config.json")).unwrap()).unwrap();
    assert_eq!(config["model_type"], "yuanvl");
    let (out, _) = succeed(&mut command("inspect", &[&exported]));
    assert!(
        out.contains("images             a tower of ") && out.contains("28 x 28 pixels"),
        "{out}"
    );
    // The rule of positions is that of the run's training.
    assert_eq!(config["image_positions"], "together");
    let together = |model: &Path| {
        let (_, data, _) = made();
        let mut command = command("generate", &[model]);
        command.args(["How is the page?", "--temperature", "0", "--max-new-tokens", "8"]);
        command.args(["--image-positions", "together", "--ignore-stop"]);
        succeed(command.arg("--image").arg(data.with_file_name("7.png"))).0
    };
    assert_eq!(together(&exported), together(run));
    succeed(command("convert", &[&exported, &half]).args(["--dtype", "bf16"]));
    let layers = [[9, 1, 7, 2, 6, 5, 4, 8], [1, 9, 2, 8, 3, 7, 4, 6]];
    fs::write(&loads, json!({ "layers": layers }).to_string()).unwrap();
    let mut planning = command("plan", &[&loads]);
    succeed(planning.args(["--beta", "0.3", "--top-k", "2", "--save"]).arg(&plan));
    succeed(&mut command("prune", &[&exported, &plan, &pruned]));
    assert_eq!(inventory(&pruned)["problems"], json!([]));
    together(&pruned);

    // A tower of another kind comes along as it is.
    let mut other = config;
    other["select_layer"] = json!(-4);
    let strange = directory.path().join("strange");
    support::copy_directory(&exported, &strange);
    fs::write(strange.join("config.json"), other.to_string()).unwrap();
    let out = directory.path().join("strange-pruned");
    succeed(&mut command("prune", &[&strange, &plan, &out]));
    assert_eq!(inventory(&out)["other_tensors"], inventory(&strange)["other_tensors"]);
    let mut asked = command("generate", &[&strange]);
    let error = fail(asked.args(["How?"]));
    assert!(error.contains("select_layer = -4 is not supported"), "{error}");
}

#[test]
fn the_report_shows_whose_experts_are_whose_and_what_was_answered() {
    let (directory, data, run) = made();
    let copy = directory.path().join("shown");
    support::copy_directory(run, &copy);
    fs::copy(data.with_file_name("5.png"), copy.join("page.png")).unwrap();
    let answer = |image: &str, answer: &str, expected: &str| Answer {
        image: image.into(),
        question: "Is 1 < 2?".into(),
        answer: answer.into(),
        expected: Some(expected.into()),
    };
    let answers = [answer("page.png", "yes", "yes"), answer("gone.png", "<b>", "no")];
    Answer::save_all(&answers, &copy).unwrap();
    succeed(&mut command("report", &[&copy]));
    let html = fs::read_to_string(copy.join("report.html")).unwrap();
    let picture = fs::read_to_string(copy.join("image_load.svg")).unwrap();
    // What images and text have in common, from the last window of the metrics.
    let metrics = fs::read_to_string(copy.join("metrics.jsonl")).unwrap();
    let mut events = metrics.lines().map(|line| serde_json::from_str::<Value>(line).unwrap());
    let last = events.rfind(|event| event["event"] == "image_load").unwrap();
    for layer in 0..2 {
        let shares = |kind: &str| -> Vec<f64> {
            let counts = last[kind][layer].as_array().unwrap().iter();
            let counts: Vec<f64> = counts.map(|count| count.as_f64().unwrap()).collect();
            let sum: f64 = counts.iter().sum();
            assert!(sum > 0.0, "{kind}");
            counts.into_iter().map(|count| count / sum).collect()
        };
        let pairs = shares("images").into_iter().zip(shares("text"));
        let common: f64 = pairs.map(|(images, text)| images.min(text)).sum();
        let shown =
            format!("layer {layer}: {:.0} % of the load on the same experts", 100.0 * common);
        assert!(picture.contains(&shown), "{shown}");
        assert!(html.contains(&format!("{:.1} %</data>", 100.0 * common)), "{common}");
    }
    assert!(html.contains("1 of 2 answers are right."));
    assert!(html.contains("<img src=\"data:image/png;base64,") && html.contains("gone.png cannot"));
    assert!(html.contains("Is 1 &lt; 2?") && html.contains("<b>&lt;b&gt;</b>"));
    // What is no answers keeps nothing else from being shown.
    let file = copy.join(Answer::FILE);
    fs::write(&file, "{").unwrap();
    succeed(&mut command("report", &[&copy]));
    let html = fs::read_to_string(copy.join("report.html")).unwrap();
    assert!(html.contains("The answers cannot be shown: cannot understand"), "{html}");
    fs::remove_file(&file).unwrap();
    fs::create_dir(&file).unwrap();
    succeed(&mut command("report", &[&copy]));
}

#[test]
fn what_is_wrong_with_images_is_a_sentence() {
    let (directory, data, run) = made();
    let refused = |arguments: &[&str]| {
        let mut command = command("generate", &[run]);
        fail(command.args(["How is the page?"]).args(arguments))
    };
    let error = refused(&["--image", "absent.png"]);
    assert!(error.contains("absent.png: cannot read it"), "{error}");
    let error = refused(&["--image", data.to_str().unwrap()]);
    assert!(error.contains("pages.jsonl: it is no image: expected PNG, JPEG"), "{error}");
    // As a shell writes `--image *.png`.
    let pages = [1, 2].map(|number| data.with_file_name(format!("{number}.png")));
    let [one, two] = pages.each_ref().map(|page| page.to_str().unwrap());
    let error = refused(&["--image", one, two]);
    assert!(error.contains("2.png` is an image, not a question: write --image before"), "{error}");
    let error = refused(&["--image-positions", "together"]);
    assert!(error.contains("--image <FILE>"), "{error}");

    let blind = directory.path().join("blind");
    let corpus = directory.path().join("corpus");
    write_corpus(&corpus);
    succeed(&mut tiny_pretrain(&corpus, &blind));
    let mut asked = command("generate", &[&blind]);
    let page = data.with_file_name("1.png");
    let error = fail(asked.args(["How?", "--image"]).arg(&page));
    assert!(error.contains("the model sees no images: it has no image tower"), "{error}");
    let tune = |from: &Path, more: &[&str]| {
        let mut tuning = command("finetune", &[from]);
        tuning.arg("--data").arg(data).arg("--run").arg(directory.path().join("none"));
        fail(tuning.args(["--steps", "2", "--seq", "64", "--validation", "0.2"]).args(more))
    };
    let error = tune(&blind, &[]);
    assert!(error.contains("the model sees no images: it has no image tower"), "{error}");
    let error = tune(run, &["--isolate"]);
    assert!(error.contains("leave out --separator, --template and --isolate"), "{error}");
    let error = tune(run, &["--validation", "1.5"]);
    assert!(error.contains("it must lie between 0 and 1"), "{error}");
    let error = tune(run, &["--freeze", "language", "--train", "routers"]);
    assert!(error.contains("nothing learns: the language model is frozen"), "{error}");
    let error = tune(run, &["--freeze", "tower"]);
    assert!(error.contains("`tower` is neither vision nor language"), "{error}");
    let error = tune(&blind, &["--freeze", "language"]);
    assert!(error.contains("freeze"), "{error}");
}
