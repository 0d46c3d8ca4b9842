//! Measuring in turns, and telling what came of it.

use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use rustix::time::{ClockId, clock_gettime};

/// One of those that take turns: operations of each turn, and how long they took.
pub(crate) struct Runner<'a> {
    what: &'static str,
    operations: u32,
    run: Box<dyn FnMut(u32) -> Result<Duration> + 'a>,
    /// Seconds for each operation, by round.
    times: Vec<f64>,
}

impl<'a> Runner<'a> {
    /// What `run` is told to do `operations` times a turn; it says how long they took.
    pub(crate) fn new(
        what: &'static str,
        operations: u32,
        run: impl FnMut(u32) -> Result<Duration> + 'a,
    ) -> Self {
        Self { what, operations, run: Box::new(run), times: Vec::new() }
    }

    /// Seconds for one operation.
    pub(crate) fn time(&self) -> f64 {
        median(self.times.clone())
    }

    /// How many times as fast as `other` it is: round by round, when both had the same machine.
    pub(crate) fn speedup(&self, other: &Self) -> f64 {
        median(self.times.iter().zip(&other.times).map(|(ours, theirs)| theirs / ours).collect())
    }
}

/// Each runner's turn, round by round, every other time backwards.
pub(crate) fn interleave(runners: &mut [Runner<'_>], rounds: u32) -> Result<()> {
    for round in 0..=rounds {
        let count = runners.len();
        for turn in 0..count {
            let runner = &mut runners[if round % 2 == 0 { turn } else { count - 1 - turn }];
            let took = (runner.run)(runner.operations).context(runner.what)?;
            // The first round makes session keys and warms caches.
            if round > 0 {
                runner.times.push(took.as_secs_f64() / f64::from(runner.operations));
            }
        }
    }
    Ok(())
}

/// In what a table has its figures.
#[derive(Clone, Copy)]
pub(crate) enum Unit {
    /// Operations a second.
    Rate,
    /// Microseconds for each.
    Micros,
    /// Milliseconds for each.
    Millis,
}

impl Unit {
    fn of(self, seconds: f64) -> f64 {
        match self {
            Self::Rate => seconds.recip(),
            Self::Micros => seconds * 1e6,
            Self::Millis => seconds * 1e3,
        }
    }
}

pub(crate) fn table(title: &str, unit: Unit, runners: &[Runner<'_>]) {
    let precision = if matches!(unit, Unit::Millis) { 1 } else { 0 };
    println!("{title:<60}{:>10}{:>10}{:>10}", "median", "least", "most");
    for runner in runners {
        let figures: Vec<f64> = runner.times.iter().map(|seconds| unit.of(*seconds)).collect();
        let least = figures.iter().copied().fold(f64::INFINITY, f64::min);
        let most = figures.iter().copied().fold(0.0, f64::max);
        let median = unit.of(runner.time());
        println!("{:<60}{median:>10.precision$}{least:>10.precision$}{most:>10.precision$}", runner.what);
    }
    println!();
}

/// A ratio that is to be at least so much.
pub(crate) fn at_least(what: &str, ratio: f64, bound: f64) {
    say(what, ratio, &format!("at least {bound}"), ratio >= bound);
}

/// A ratio or size that is to be at most so much.
pub(crate) fn at_most(what: &str, figure: f64, bound: f64) {
    say(what, figure, &format!("at most {bound}"), figure <= bound);
}

fn say(what: &str, figure: f64, bound: &str, kept: bool) {
    println!("{what:<70}{figure:>10.2}   {bound}: {}", if kept { "kept" } else { "NOT KEPT" });
}

/// How long `work` takes.
pub(crate) fn timed(work: impl FnOnce() -> Result<()>) -> Result<Duration> {
    let start = Instant::now();
    work()?;
    Ok(start.elapsed())
}

/// How long this thread has to compute for `work`, however many others want its processor.
pub(crate) fn computed(work: impl FnOnce() -> Result<()>) -> Result<Duration> {
    let now = || Duration::try_from(clock_gettime(ClockId::ThreadCPUTime));
    let start = now()?;
    work()?;
    Ok(now()? - start)
}

/// Most of a hundred operations: what a median does not show, such as a delayed acknowledgement now and then.
pub(crate) const MOST_OF_HUNDRED: f64 = 0.99;
pub(crate) const MEDIAN: f64 = 0.5;

/// How long `count` operations would take if each took as long as this share of them does at most. In the median none
/// has to wait for a processor, which takes milliseconds.
pub(crate) fn timed_each(
    count: u32,
    share: f64,
    mut operation: impl FnMut() -> Result<()>,
) -> Result<Duration> {
    of_share(count, share, || timed(&mut operation))
}

/// The same, of operations that say how long they took.
pub(crate) fn of_share(
    count: u32,
    share: f64,
    mut operation: impl FnMut() -> Result<Duration>,
) -> Result<Duration> {
    let mut times: Vec<_> = (0..count).map(|_| operation()).collect::<Result<_>>()?;
    times.sort();
    let place = f64::from(count.saturating_sub(1)) * share;
    let one = times.get(place as usize).copied().unwrap_or_default();
    Ok(one * count)
}

/// Of at least one number.
fn median(mut numbers: Vec<f64>) -> f64 {
    numbers.sort_by(f64::total_cmp);
    let middle = numbers.len() / 2;
    if numbers.len() % 2 == 1 { numbers[middle] } else { (numbers[middle - 1] + numbers[middle]) / 2.0 }
}
