//! The stack against real peers: what boots QEMU and a Debian guest, and what talks to them.
//!
//! [`guest`] is a machine with a real kernel, `pcscd`, `libccid` and OpenSC in it; a scenario starts one with
//! the USB devices it is about and runs commands inside.

#![forbid(unsafe_code)]

use anyhow::{Context, Result, ensure};

pub mod database;
pub mod echo;
pub mod floor;
pub mod guest;
pub mod host;
pub mod naive;
pub mod openssl;
pub mod passthru;
pub mod pcscd;
pub mod port;
pub mod process;
pub mod reader;
pub mod softhsm;
mod turn;

pub use turn::alone;

/// SELECT of the first PKI container.
pub const SELECT: &str = "00A4040007A0000000790100";

/// A command as the tools in the guest take it.
pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02X}")).collect()
}

/// 50 SELECTs, one after the other, for [`acknowledged_at_once`].
pub fn selects() -> String {
    format!("guest-pcsc transmit{}", format!(" {SELECT}").repeat(50))
}

/// Whether no delayed acknowledgement held up the exchanges that `guest-pcsc transmit` printed.
///
/// A peer that writes the header and the rest of a message apart sends the rest when the header is acknowledged
/// (Nagle's algorithm), and Linux delays that by 40 ms (TCP_DELACK_MIN) unless TCP_QUICKACK is set before. Then no
/// exchange takes less, but for the first few of a connection; of others only those that wait for a processor take as
/// long.
pub fn acknowledged_at_once(said: &str) -> Result<()> {
    let times = said.lines().map(|line| line.strip_suffix(" ms")?.rsplit(' ').next()?.parse().ok());
    let mut times: Vec<f64> = times.collect::<Option<_>>().with_context(|| format!("no times: {said}"))?;
    times.sort_by(f64::total_cmp);
    let quick = times.get(times.len() / 2).is_some_and(|ms| *ms < 40.0);
    ensure!(quick, "half of {} exchanges or more were held up: {said}", times.len());
    Ok(())
}

/// How often a scenario repeats: `small` in `cargo xtask test`, `large` in `cargo xtask soak`.
pub fn scale(small: u32, large: u32) -> u32 {
    if std::env::var_os("STACK_SCALE").is_some_and(|scale| scale == "soak") { large } else { small }
}
