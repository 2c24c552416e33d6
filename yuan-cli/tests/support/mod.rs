//! Runs the program as a user would, in directories of their own.
#![allow(dead_code, reason = "every test binary uses its own part")]

use std::{
    fs,
    path::Path,
    process::{Command, Output},
};

/// The program with a command.
pub fn yuan(command: &str) -> Command {
    let mut program = Command::new(env!("CARGO_BIN_EXE_yuan"));
    program.arg(command);
    program
}

/// Writes some dozens of small texts with enough structure to learn from.
pub fn write_corpus(directory: &Path) {
    fs::create_dir_all(directory).expect("a directory");
    let words = [
        "expert", "router", "token", "load", "prune", "layer", "group", "stable", "phase",
        "balance",
    ];
    for file in 0..60_usize {
        let sentence = |i: usize| {
            let word = |k: usize| words[(i * 7 + k * 3 + file) % words.len()];
            format!("the {} of a {} meets the {} in its {}.\n", word(0), word(1), word(2), word(3))
        };
        let text: String = (0..40).map(sentence).collect();
        fs::write(directory.join(format!("text-{file:02}.md")), text).expect("a file");
    }
}

/// `yuan pretrain` with a model that trains in seconds, checkpoints often and prunes at step
/// 12.
pub fn tiny_pretrain(data: &Path, run: &Path) -> Command {
    let mut command = tiny_plain(data, run);
    command.args(["--prune-at", "12"]);
    command
}

/// The same without a step to prune at.
pub fn tiny_plain(data: &Path, run: &Path) -> Command {
    let mut command = yuan("pretrain");
    command.arg("--data").arg(data).arg("--run").arg(run);
    let options = "--steps 24 --layers 2 --hidden 32 --experts 8 --vocab 300 --batch 2 --seq 32 \
        --validate-every 6 --checkpoint-every 3 --window 2 --beta 0.4 --min-experts 2 \
        --learning-rate 1e-2";
    command.args(options.split_whitespace());
    command
}

/// Standard output and error of a program that succeeded.
pub fn succeed(command: &mut Command) -> (String, String) {
    let output = command.output().expect("the program starts");
    let (out, err) = texts(&output);
    assert!(output.status.success(), "{command:?} failed: {err}");
    (out, err)
}

/// Standard error of a program that failed.
pub fn fail(command: &mut Command) -> String {
    let output = command.output().expect("the program starts");
    let (out, err) = texts(&output);
    assert!(!output.status.success(), "{command:?} succeeded: {out}");
    err
}

fn texts(output: &Output) -> (String, String) {
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    (text(&output.stdout), text(&output.stderr))
}

/// Copies a directory with all that is below it.
pub fn copy_directory(from: &Path, to: &Path) {
    fs::create_dir_all(to).expect("a directory");
    for entry in fs::read_dir(from).expect("a directory").flatten() {
        let (path, to) = (entry.path(), to.join(entry.file_name()));
        if path.is_dir() {
            copy_directory(&path, &to);
        } else {
            fs::copy(&path, &to).expect("a copy");
        }
    }
}
