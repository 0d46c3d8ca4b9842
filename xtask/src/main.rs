//! The project's chores. Needs cargo and Debian's tools, no crate and no C library: it has to run before
//! anything is installed.

#![forbid(unsafe_code)]

mod packages;
mod steps;
mod tools;

use std::ffi::OsStr;
use std::path::Path;
use std::process::{Command, ExitCode, Stdio};

use steps::{Failure, Steps};

const USAGE: &str = "\
usage: cargo xtask COMMAND

  setup               install the Debian packages that building and testing need, and cargo-deny for .ci/run
  test [ARGS]         everything: unit tests, then the stack against QEMU, a Debian guest, pcscd and OpenSC
  soak [ARGS]         five minutes for each fuzz target, then the stack tests, longer: with STACK_SCALE=soak
  demo [ARGS]         boot a guest and use a virtual card in it
  bench [ARGS]        measure the libraries, then the stack
  guest               build the test guest's image

ARGS go to the last step: a filter and options of the test program, or the demo's or benchmark's own.

examples:
  cargo xtask setup
  cargo xtask test
  cargo xtask test guest_boots        only stack tests whose name has this in it (unit tests all run)
  STACK_SCALE=soak cargo xtask test   the stack tests of `cargo xtask soak`, and the unit tests before them
  cargo xtask demo -- --help
";

/// What the stack tests start: the programs of these packages.
const PROGRAMS: [&str; 8] =
    ["build", "--locked", "-p", "ccid-device", "-p", "vscclient", "-p", "stack-tests"];

/// In `fuzz/fuzz_targets`.
const FUZZ_TARGETS: [&str; 6] = ["card", "ccid", "options", "usbredir", "usbip", "vscard"];

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let Some((command, mut rest)) = args.split_first() else {
        eprint!("{USAGE}");
        return ExitCode::from(2);
    };
    if rest.first().is_some_and(|arg| arg == "--") {
        rest = &rest[1..];
    }
    let mut steps = Steps::new();
    let done = match command.as_str() {
        "setup" => setup(&mut steps).and_then(|()| steps.inside("cargo-deny", tools::install)),
        "test" => test(&mut steps, rest),
        "soak" => soak(&mut steps, rest),
        "demo" => demo(&mut steps, rest),
        "bench" => bench(&mut steps, rest),
        "guest" => guest(&mut steps),
        "help" | "--help" | "-h" => {
            print!("{USAGE}");
            return ExitCode::SUCCESS;
        }
        _ => {
            eprint!("xtask: no command {command}\n{USAGE}");
            return ExitCode::from(2);
        }
    };
    steps.total();
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            eprintln!("xtask: {failure}");
            failure.exit_code()
        }
    }
}

fn setup(steps: &mut Steps) -> Result<(), Failure> {
    steps.inside("packages", packages::install)
}

fn test(steps: &mut Steps, args: &[String]) -> Result<(), Failure> {
    setup(steps)?;
    steps.inside("tools", packages::probe)?;
    steps.cargo("programs", PROGRAMS.iter().chain(&["--bins"]), &[])?;
    steps.cargo("unit tests", ["test", "--locked", "--workspace", "--exclude", "stack-tests"], &[])?;
    stack_tests(steps, args, &[])
}

fn soak(steps: &mut Steps, args: &[String]) -> Result<(), Failure> {
    setup(steps)?;
    steps.inside("tools", packages::probe)?;
    fuzz(steps)?;
    steps.cargo("programs", PROGRAMS.iter().chain(&["--bins"]), &[])?;
    stack_tests(steps, args, &[("STACK_SCALE", "soak")])
}

/// Each target in turn. What is found to be of interest stays out of the checked-in corpora.
fn fuzz(steps: &mut Steps) -> Result<(), Failure> {
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let version = Command::new(cargo).args(["fuzz", "--version"]).stderr(Stdio::null()).status();
    if !version.is_ok_and(|status| status.success()) {
        eprintln!("xtask: cargo-fuzz is NOT INSTALLED; `cargo install` gets it for this user");
        steps.cargo("cargo-fuzz", ["install", "--locked", "cargo-fuzz"], &[])?;
    }
    let fuzz = Path::new(env!("CARGO_MANIFEST_DIR")).with_file_name("fuzz");
    for target in FUZZ_TARGETS {
        let (found, corpus) = (fuzz.join("target/corpus").join(target), fuzz.join("corpus").join(target));
        std::fs::create_dir_all(&found)
            .map_err(|error| Failure::Other(format!("{}: {error}", found.display())))?;
        let mut args: Vec<&OsStr> = ["fuzz", "run", "--fuzz-dir"].map(OsStr::new).to_vec();
        args.extend([fuzz.as_os_str(), OsStr::new(target), found.as_os_str(), corpus.as_os_str()]);
        args.extend(["--", "-max_total_time=300", "-timeout=10", "-rss_limit_mb=512"].map(OsStr::new));
        args.extend(["-max_len=4096", "-print_final_stats=1"].map(OsStr::new));
        // The sanitizer keeps 256 MiB of freed memory otherwise, which would hide what is really used.
        let environment = [("RUSTC_BOOTSTRAP", "1"), ("ASAN_OPTIONS", "quarantine_size_mb=32")];
        steps.cargo(&format!("fuzz target {target}"), args, &environment)?;
    }
    Ok(())
}

/// Two at a time, as each waits for its guest half of the time; those that measure time see to it that they are alone.
/// A line tells when one has ended; what it said comes after the last one.
fn stack_tests(steps: &mut Steps, args: &[String], environment: &[(&str, &str)]) -> Result<(), Failure> {
    let fixed = ["test", "--locked", "-p", "stack-tests", "--", "--show-output"];
    let args = fixed.into_iter().chain(args.iter().map(String::as_str));
    let environment = [&[("RUST_TEST_THREADS", "2")], environment].concat();
    steps.cargo("stack tests", args, &environment)
}

fn demo(steps: &mut Steps, args: &[String]) -> Result<(), Failure> {
    setup(steps)?;
    steps.inside("tools", packages::probe)?;
    steps.cargo("programs", PROGRAMS.iter().chain(&["--bins"]), &[])?;
    let fixed = ["run", "--quiet", "--locked", "-p", "stack-tests", "--bin", "demo", "--"];
    steps.cargo("demo", fixed.into_iter().chain(args.iter().map(String::as_str)), &[])
}

fn bench(steps: &mut Steps, args: &[String]) -> Result<(), Failure> {
    setup(steps)?;
    steps.inside("tools", packages::probe)?;
    let libraries =
        ["bench", "--locked", "-p", "vscard-protocol", "-p", "emulated-card", "-p", "ccid-device"];
    steps.cargo("library benchmarks", libraries, &[])?;
    steps.cargo("programs", PROGRAMS.iter().chain(&["--bins", "--release"]), &[])?;
    for (name, binary) in [("card benchmarks", "bench-card"), ("stack benchmarks", "bench")] {
        let fixed = ["run", "--quiet", "--release", "--locked", "-p", "stack-tests", "--bin", binary, "--"];
        steps.cargo(name, fixed.into_iter().chain(args.iter().map(String::as_str)), &[])?;
    }
    Ok(())
}

fn guest(steps: &mut Steps) -> Result<(), Failure> {
    setup(steps)?;
    steps.inside("tools", packages::probe)?;
    steps.cargo("programs", ["build", "--locked", "-p", "stack-tests", "--bins"], &[])?;
    steps.cargo("image", ["run", "--quiet", "--locked", "-p", "stack-tests", "--bin", "guest-image"], &[])
}
