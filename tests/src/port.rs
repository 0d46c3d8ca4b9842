//! TCP ports for programs that cannot be asked which one they took.

use std::net::{Ipv4Addr, TcpListener};
use std::sync::atomic::{AtomicU32, Ordering};

use anyhow::{Context, Result};

/// Below those that the kernel gives to whoever asks for any port, or connects: what is free stays free.
const FIRST: u32 = 10_000;
const COUNT: u32 = 20_000;

/// A port of the loopback that is free, and that no other test of this process gets.
pub fn free() -> Result<u16> {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    // Another test program begins elsewhere.
    let start = std::process::id().wrapping_mul(97);
    let mut ports = (0..COUNT).filter_map(|_| {
        let next = start.wrapping_add(NEXT.fetch_add(1, Ordering::Relaxed));
        u16::try_from(FIRST + next % COUNT).ok()
    });
    ports.find(|port| TcpListener::bind((Ipv4Addr::LOCALHOST, *port)).is_ok()).context("no port is free")
}
