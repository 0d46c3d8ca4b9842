//! The one way to wait.

use std::future::Future;
use std::time::Duration;

use anyhow::{Result, anyhow};

use super::{Guest, PCSCD_LOG};

/// How much of each log a report shows.
const TAIL_LINES: usize = 40;

/// A guest that hangs must not make the report hang.
const LOG_LIMIT: Duration = Duration::from_secs(3);

/// Waits for `future`, for at most `limit`. When that is over the error tells `what` was awaited and, given a
/// guest, the ends of its console, QEMU's output and pcscd's log.
pub async fn within<T>(
    guest: Option<&Guest>,
    limit: Duration,
    what: &str,
    future: impl Future<Output = T>,
) -> Result<T> {
    match tokio::time::timeout(limit, future).await {
        Ok(value) => Ok(value),
        Err(_) => {
            let mut report = format!("not within {limit:?}: {what}");
            if let Some(guest) = guest {
                report.push_str(&guest.report().await);
            }
            Err(anyhow!(report))
        }
    }
}

impl Guest {
    /// The ends of all logs, for the message of a failure.
    pub async fn report(&self) -> String {
        let pcscd = match tokio::time::timeout(LOG_LIMIT, self.agent.get(PCSCD_LOG)).await {
            Ok(Ok(bytes)) => without_apdus(&String::from_utf8_lossy(&bytes)),
            Ok(Err(error)) => format!("({error:#})"),
            Err(_) => "(the guest's agent does not answer)".to_owned(),
        };
        let ended = self.ended().map(|status| format!("QEMU has ended: {status}\n")).unwrap_or_default();
        [
            ("QEMU", format!("{ended}{}", self.qemu_log())),
            ("the guest's console", self.console()),
            ("pcscd", pcscd),
        ]
        .iter()
        .map(|(name, text)| format!("\n--- {name}:\n{}", tail(text)))
        .collect()
    }
}

/// libccid logs a line for each APDU that tells nothing but that there was one.
fn without_apdus(log: &str) -> String {
    let lines: Vec<_> = log.lines().filter(|line| !line.contains("IFDHTransmitToICC()")).collect();
    lines.join("\n")
}

fn tail(text: &str) -> String {
    let lines: Vec<_> = text.lines().collect();
    lines[lines.len().saturating_sub(TAIL_LINES)..].join("\n")
}
