//! The stack against real peers: what boots QEMU and a Debian guest, and what talks to them.
//!
//! [`guest`] is a machine with a real kernel, `pcscd`, `libccid` and OpenSC in it; a scenario starts one with
//! the USB devices it is about and runs commands inside.

#![forbid(unsafe_code)]

pub mod database;
pub mod echo;
pub mod floor;
pub mod guest;
pub mod host;
pub mod naive;
pub mod openssl;
pub mod passthru;
pub mod pcscd;
pub mod process;
pub mod reader;
pub mod softhsm;

/// SELECT of the first PKI container.
pub const SELECT: &str = "00A4040007A0000000790100";

/// A command as the tools in the guest take it.
pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02X}")).collect()
}

/// How often a scenario repeats: `small` in `cargo xtask test`, `large` in `cargo xtask soak`.
pub fn scale(small: u32, large: u32) -> u32 {
    if std::env::var_os("STACK_SCALE").is_some_and(|scale| scale == "soak") { large } else { small }
}
