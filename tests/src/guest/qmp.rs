//! QEMU's machine protocol: one JSON object per line.

use std::sync::Arc;

use anyhow::{Context, Result, anyhow, bail};
use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader, Lines};
use tokio::net::UnixStream;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::sync::{Mutex, watch};

use super::pending::Pending;

pub(super) struct Qmp {
    writer: Mutex<OwnedWriteHalf>,
    pending: Arc<Pending<Value>>,
    events: watch::Receiver<Vec<Value>>,
}

impl Qmp {
    /// Takes QEMU's greeting and leaves negotiation mode.
    pub(super) async fn greet(stream: UnixStream) -> Result<Self> {
        let (reader, writer) = stream.into_split();
        let mut lines = BufReader::new(reader).lines();
        let greeting = lines.next_line().await?.context("QEMU closed QMP before its greeting")?;
        if !greeting.contains("\"QMP\"") {
            bail!("QEMU greets with {greeting}");
        }
        let pending = Arc::<Pending<Value>>::default();
        let (events_sender, events) = watch::channel(Vec::new());
        tokio::spawn({
            let pending = Arc::clone(&pending);
            async move {
                let _ = answers(lines, &pending, &events_sender).await;
                pending.close();
            }
        });
        let qmp = Self { writer: Mutex::new(writer), pending, events };
        qmp.execute("qmp_capabilities", Value::Null).await?;
        Ok(qmp)
    }

    pub(super) async fn execute(&self, execute: &str, arguments: Value) -> Result<Value> {
        let (id, answer) = self.pending.ask();
        let mut request = json!({ "execute": execute, "id": id });
        if !arguments.is_null() {
            request["arguments"] = arguments;
        }
        let sent = self.writer.lock().await.write_all(format!("{request}\n").as_bytes()).await;
        sent.with_context(|| format!("QMP {execute}"))?;
        let mut answer = answer.await.map_err(|_| anyhow!("QMP {execute}: QEMU ended before it answered"))?;
        match answer.get("error") {
            Some(error) => bail!("QMP {execute}: {error}"),
            None => Ok(answer["return"].take()),
        }
    }

    pub(super) fn events(&self) -> Vec<Value> {
        self.events.borrow().clone()
    }

    pub(super) async fn event(&self, wanted: impl Fn(&Value) -> bool) -> Result<Value> {
        let mut events = self.events.clone();
        let seen = events.wait_for(|events| events.iter().any(&wanted)).await;
        let seen = seen.context("QEMU ended before the event came")?;
        seen.iter().find(|event| wanted(event)).cloned().context("the event is gone")
    }
}

async fn answers(
    mut lines: Lines<BufReader<OwnedReadHalf>>,
    pending: &Pending<Value>,
    events: &watch::Sender<Vec<Value>>,
) -> Result<()> {
    while let Some(line) = lines.next_line().await? {
        let message: Value = serde_json::from_str(&line)?;
        if message.get("event").is_some() {
            events.send_modify(|events| events.push(message));
        } else if let Some(id) = message["id"].as_u64() {
            pending.answer(id, message);
        }
    }
    Ok(())
}
