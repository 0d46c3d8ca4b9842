//! The USB/IP server: one endpoint, any number of readers.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::sync::{Semaphore, mpsc};
use vscard_protocol::Secret;
use vscard_protocol::chardev::{Channel, ChannelError, Stream};

use crate::Topology;
use crate::usbip::management::Output;
use crate::usbip::{Export, Management, Urbs};

/// Clients that may be choosing at a time; more wait in the backlog.
const MOST_CHOOSING: usize = 16;

type Imported = (Stream, Secret);

/// One reader's place at a server.
pub struct Exports {
    shared: Arc<Mutex<Vec<Export>>>,
    index: usize,
    imported: mpsc::Receiver<Imported>,
}

impl Exports {
    /// The places of `devices` at one server, and the server itself; it ends only when `channel` is of no use.
    pub fn serve(
        channel: Channel,
        devices: Vec<Topology>,
    ) -> (Vec<Self>, impl Future<Output = Result<(), ChannelError>> + Send) {
        let exports = devices.into_iter().zip(1..).map(|(topology, number)| Export::new(number, topology));
        let shared = Arc::new(Mutex::new(exports.collect::<Vec<_>>()));
        let mut places = Vec::new();
        let mut senders = Vec::new();
        for index in 0..lock(&shared).len() {
            let (sender, imported) = mpsc::channel(1);
            senders.push(sender);
            places.push(Self { shared: shared.clone(), index, imported });
        }
        (places, accept(channel, shared, senders))
    }

    /// What clients ask for.
    pub fn busid(&self) -> String {
        lock(&self.shared)[self.index].busid()
    }

    pub(super) async fn imported(&mut self) -> Option<Imported> {
        self.imported.recv().await
    }

    pub(super) fn urbs(&self) -> Urbs {
        Urbs::new(&lock(&self.shared)[self.index])
    }

    pub(super) fn set_free(&self) {
        lock(&self.shared)[self.index].set_imported(false);
    }
}

fn lock(exports: &Mutex<Vec<Export>>) -> MutexGuard<'_, Vec<Export>> {
    exports.lock().unwrap_or_else(PoisonError::into_inner)
}

async fn accept(
    mut channel: Channel,
    shared: Arc<Mutex<Vec<Export>>>,
    senders: Vec<mpsc::Sender<Imported>>,
) -> Result<(), ChannelError> {
    let places = Arc::new(Semaphore::new(MOST_CHOOSING));
    loop {
        let Ok(place) = places.clone().acquire_owned().await else { return Ok(()) };
        match channel.stream().await {
            Ok(stream) => {
                let (shared, senders) = (shared.clone(), senders.clone());
                tokio::spawn(async move {
                    choose(stream, &shared, &senders).await;
                    drop(place);
                });
            }
            Err(error) if !error.is_transient() => return Err(error),
            Err(error) => tracing::debug!("{error}"),
        }
    }
}

/// Until the client has a device, or its list, or a refusal.
async fn choose(mut stream: Stream, shared: &Mutex<Vec<Export>>, senders: &[mpsc::Sender<Imported>]) {
    let mut management = Management::new(Instant::now());
    let mut buffer = vec![0; 1024];
    loop {
        let Some(deadline) = management.next_deadline() else { return };
        let count = tokio::select! {
            read = stream.read(&mut buffer) => match read {
                Ok(count @ 1..) => count,
                _ => return,
            },
            () = tokio::time::sleep_until(deadline.into()) => {
                management.handle_deadline(Instant::now());
                0
            }
        };
        let mut rest = &buffer[..count];
        let mut chosen = None;
        let mut outputs = Vec::new();
        {
            // Asked and marked in one go, or two clients could have the same device.
            let mut exports = lock(shared);
            management.handle(&mut rest, &exports);
            while let Some(output) = management.poll_output() {
                if let Output::Import(index) = output {
                    exports[index].set_imported(true);
                    chosen = Some(index);
                }
                outputs.push(output);
            }
        }
        let mut unsent = false;
        let mut closed = false;
        for output in outputs {
            match output {
                Output::Send(bytes) => unsent |= stream.write_all(&bytes).await.is_err(),
                Output::Import(_) => {}
                Output::Close(reason) => {
                    tracing::debug!("USB/IP client: {reason}");
                    closed = true;
                }
            }
        }
        if let Some(index) = chosen {
            let handed = !unsent && senders[index].send((stream, Secret::from(rest))).await.is_ok();
            if !handed {
                lock(shared)[index].set_imported(false);
            }
            return;
        }
        if unsent || closed {
            let _ = stream.shutdown().await;
            return;
        }
    }
}
