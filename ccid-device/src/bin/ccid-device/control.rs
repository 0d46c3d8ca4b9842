//! The control socket: JSON lines in QMP's style.

use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use ccid_device::SlotId;
use ccid_device::reader::{Handle, ReaderEvent};
use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::sync::{Notify, broadcast};
use vscard_protocol::chardev::{Channel, Place, Places, Stream};

/// Longest command.
const MOST_LINE: u64 = 64 * 1024;
/// Clients at a time. One more takes the place of the one that has been silent longest: who only listens for events has
/// never said anything, and comes again.
const MOST_CLIENTS: usize = 8;

/// A running reader as the control socket shows it.
pub(crate) struct Running {
    pub(crate) carrier: &'static str,
    pub(crate) endpoint: String,
    pub(crate) handle: Handle,
    /// For each slot, the kind of its card.
    pub(crate) cards: Vec<Option<&'static str>>,
}

/// What clients may ask for.
pub(crate) struct Control {
    pub(crate) readers: Vec<Running>,
    pub(crate) events: broadcast::Sender<(usize, ReaderEvent)>,
    pub(crate) quit: Notify,
}

/// Serves clients until the channel is of no use.
pub(crate) async fn serve(mut channel: Channel, control: Arc<Control>) {
    let mut places = Places::new(MOST_CLIENTS);
    loop {
        match channel.stream().await {
            Ok(stream) => {
                let (control, place) = (control.clone(), places.take().await);
                tokio::spawn(async move {
                    tokio::select! {
                        _ = client(stream, &place, &control) => {}
                        () = place.lost() => {}
                    }
                });
            }
            Err(error) => return tracing::error!("no further commands: {error}"),
        }
    }
}

async fn client(stream: Stream, place: &Place, control: &Control) -> std::io::Result<()> {
    let (reader, mut writer) = tokio::io::split(stream);
    let mut reader = BufReader::new(reader);
    let mut events = control.events.subscribe();
    let mut line = Vec::new();
    let greeting = json!({"ccid-device": {"version": env!("CARGO_PKG_VERSION")}});
    write(&mut writer, &greeting).await?;
    loop {
        let mut limited = (&mut reader).take(MOST_LINE - line.len() as u64);
        let answer = tokio::select! {
            // What was read of a line stays in `line` when an event comes first.
            read = limited.read_until(b'\n', &mut line) => match read? {
                0 => return Ok(()),
                _ if line.last() == Some(&b'\n') => {
                    place.heard();
                    let answer = command(&line, control).await;
                    line.clear();
                    answer
                }
                _ if line.len() as u64 >= MOST_LINE => {
                    let error = failure(&Value::Null, "the line is longer than 64 KiB");
                    return write(&mut writer, &error).await;
                }
                _ => continue,
            },
            event = events.recv() => match event {
                Ok((reader, event)) => told(reader, event),
                // A client that did not read in time asks again how things are.
                Err(broadcast::error::RecvError::Lagged(count)) => {
                    json!({"event": "EVENTS_LOST", "data": {"count": count}, "timestamp": timestamp()})
                }
                Err(broadcast::error::RecvError::Closed) => return Ok(()),
            },
        };
        write(&mut writer, &answer).await?;
    }
}

async fn write(writer: &mut (impl AsyncWriteExt + Unpin), value: &Value) -> std::io::Result<()> {
    writer.write_all(format!("{value}\r\n").as_bytes()).await?;
    writer.flush().await
}

async fn command(line: &[u8], control: &Control) -> Value {
    if line.iter().all(u8::is_ascii_whitespace) {
        return failure(&Value::Null, "an empty line is no command");
    }
    let request: Value = match serde_json::from_slice(line) {
        Ok(request) => request,
        Err(error) => return failure(&Value::Null, &format!("no JSON: {error}")),
    };
    let id = request.get("id").cloned().unwrap_or_default();
    let arguments = &request["arguments"];
    match request["execute"].as_str() {
        Some("query-readers") => {
            let mut readers = Vec::new();
            for (number, reader) in control.readers.iter().enumerate() {
                let Some(status) = reader.handle.status().await else { continue };
                let slots: Vec<_> = reader
                    .cards
                    .iter()
                    .zip(status.cards)
                    .enumerate()
                    .map(|(slot, (kind, present))| json!({"slot": slot, "card": kind, "present": present}))
                    .collect();
                readers.push(json!({
                    "reader": number, "carrier": reader.carrier, "endpoint": reader.endpoint,
                    "plugged": status.plugged, "attached": status.attached, "slots": slots,
                }));
            }
            success(&id, &json!(readers))
        }
        Some(execute @ ("insert" | "remove")) => {
            let (Some(reader), Some(slot)) = (number(arguments, "reader"), number(arguments, "slot")) else {
                return failure(&id, "the arguments reader and slot must be given, as numbers");
            };
            let inserted = match (control.readers.get(reader), u8::try_from(slot)) {
                (Some(reader), Ok(slot)) => {
                    reader.handle.set_inserted(SlotId(slot), execute == "insert").await
                }
                _ => None,
            };
            match inserted {
                Some(present) => success(&id, &json!({"present": present})),
                None => failure(&id, "there is no card in that reader and slot"),
            }
        }
        Some(execute @ ("detach" | "unplug" | "plug")) => {
            let Some(reader) = number(arguments, "reader") else {
                return failure(&id, "the argument reader must be given, as a number");
            };
            let Some(Running { handle, .. }) = control.readers.get(reader) else {
                return failure(&id, "there is no such reader");
            };
            let done = match execute {
                "detach" => Some(json!({"detached": handle.detach().await})),
                "unplug" => handle.unplug().await.map(|()| json!({"plugged": false})),
                _ => handle.plug().await.map(|()| json!({"plugged": true})),
            };
            match done {
                Some(done) => success(&id, &done),
                None => failure(&id, "that reader has ended"),
            }
        }
        Some("quit") => {
            control.quit.notify_one();
            success(&id, &json!({}))
        }
        Some(other) => {
            let known = "query-readers, insert, remove, detach, unplug, plug and quit";
            failure(&id, &format!("no command {other:?}; there are {known}"))
        }
        None => failure(&id, "\"execute\" is missing"),
    }
}

fn number(arguments: &Value, key: &str) -> Option<usize> {
    arguments[key].as_u64().and_then(|number| number.try_into().ok())
}

fn success(id: &Value, value: &Value) -> Value {
    with_id(json!({"return": value}), id)
}

fn failure(id: &Value, description: &str) -> Value {
    with_id(json!({"error": {"class": "GenericError", "desc": description}}), id)
}

fn with_id(mut answer: Value, id: &Value) -> Value {
    if !id.is_null() {
        answer["id"] = id.clone();
    }
    answer
}

fn told(reader: usize, event: ReaderEvent) -> Value {
    let (name, data) = match event {
        ReaderEvent::Inserted(SlotId(slot)) => ("CARD_INSERTED", json!({"reader": reader, "slot": slot})),
        ReaderEvent::Removed(SlotId(slot)) => ("CARD_REMOVED", json!({"reader": reader, "slot": slot})),
        ReaderEvent::Attached => ("READER_ATTACHED", json!({"reader": reader})),
        ReaderEvent::Detached => ("READER_DETACHED", json!({"reader": reader})),
    };
    json!({"event": name, "data": data, "timestamp": timestamp()})
}

fn timestamp() -> Value {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    json!({"seconds": now.as_secs(), "microseconds": now.subsec_micros()})
}
