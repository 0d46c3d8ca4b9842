//! The USB/IP server: one endpoint, any number of readers.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::sync::{mpsc, watch};
use tokio::time::timeout;
use vscard_protocol::chardev::{Channel, ChannelError, Place, Places, Stream};
use vscard_protocol::{LogBudget, Secret};

use crate::Topology;
use crate::usbip::management::{CloseReason, Output};
use crate::usbip::{Export, Management, Urbs};

/// Clients that may be choosing at a time. Whoever asks for nothing gives way to one that comes.
const MOST_CHOOSING: usize = 16;
/// For a client to take its answer.
const ANSWER_WAIT: Duration = Duration::from_secs(5);
/// What a reader hears from its server.
pub(super) enum Order {
    /// A client has it. These bytes have come after its request.
    Imported(Stream, Secret),
    /// Another client wants it: the one that has it may be gone.
    Ask,
}

/// What the clients of a server share.
struct Server {
    exports: Mutex<Vec<Export>>,
    /// Changes when one of them becomes free.
    freed: watch::Sender<()>,
    /// That a device is wanted which another client has.
    refusals: LogBudget<()>,
}

impl Server {
    fn lock(&self) -> MutexGuard<'_, Vec<Export>> {
        self.exports.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn set_free(&self, index: usize) {
        self.lock()[index].set_imported(false);
        self.freed.send_replace(());
    }
}

/// One reader's place at a server.
pub struct Exports {
    server: Arc<Server>,
    index: usize,
    orders: mpsc::Receiver<Order>,
}

impl Exports {
    /// The places of `devices` at one server, and the server itself; it ends only when `channel` is of no use.
    pub fn serve(
        channel: Channel,
        devices: Vec<Topology>,
    ) -> (Vec<Self>, impl Future<Output = Result<(), ChannelError>> + Send) {
        let exports = devices.into_iter().zip(1..).map(|(topology, number)| Export::new(number, topology));
        let exports = exports.collect::<Vec<_>>();
        let count = exports.len();
        let (exports, freed) = (Mutex::new(exports), watch::Sender::new(()));
        let server = Arc::new(Server { exports, freed, refusals: LogBudget::new() });
        let mut places = Vec::new();
        let mut senders = Vec::new();
        for index in 0..count {
            let (sender, orders) = mpsc::channel(1);
            senders.push(sender);
            places.push(Self { server: server.clone(), index, orders });
        }
        (places, accept(channel, server, senders))
    }

    /// What clients ask for.
    pub fn busid(&self) -> String {
        self.server.lock()[self.index].busid()
    }

    pub(super) async fn order(&mut self) -> Option<Order> {
        self.orders.recv().await
    }

    pub(super) fn urbs(&self) -> Urbs {
        Urbs::new(&self.server.lock()[self.index])
    }

    pub(super) fn set_free(&self) {
        self.server.set_free(self.index);
    }

    pub(super) fn set_plugged(&self, plugged: bool) {
        self.server.lock()[self.index].set_plugged(plugged);
    }
}

async fn accept(
    mut channel: Channel,
    server: Arc<Server>,
    senders: Vec<mpsc::Sender<Order>>,
) -> Result<(), ChannelError> {
    let mut places = Places::new(MOST_CHOOSING);
    loop {
        let stream = channel.stream().await?;
        let place = places.take().await;
        let (server, senders) = (server.clone(), senders.clone());
        tokio::spawn(async move { choose(stream, place, &server, &senders).await });
    }
}

/// Until the client has a device, or its list, or a refusal.
async fn choose(mut stream: Stream, place: Place, server: &Server, senders: &[mpsc::Sender<Order>]) {
    let mut management = Management::new(Instant::now());
    let mut freed = server.freed.subscribe();
    let mut buffer = vec![0; 1024];
    let mut early = Secret::default();
    loop {
        let Some(deadline) = management.next_deadline() else { return };
        let count = tokio::select! {
            read = stream.read(&mut buffer), if !management.is_waiting() => match read {
                Ok(count @ 1..) => count,
                _ => return,
            },
            _ = freed.changed(), if management.is_waiting() => 0,
            () = tokio::time::sleep_until(deadline.into()) => {
                management.handle_deadline(Instant::now());
                0
            }
            // Nothing has been given to it, and nothing is owed.
            () = place.lost() => return,
        };
        let mut rest = &buffer[..count];
        let mut chosen = None;
        let mut outputs = Vec::new();
        {
            // Asked and marked in one go, or two clients could have the same device.
            let mut exports = server.lock();
            management.handle(&mut rest, &exports, Instant::now());
            while let Some(output) = management.poll_output() {
                if let Output::Import(index) = output {
                    exports[index].set_imported(true);
                    chosen = Some(index);
                }
                outputs.push(output);
            }
        }
        early.extend(rest);
        if management.is_waiting() {
            place.heard();
        }
        let mut unsent = false;
        let mut closed = false;
        for output in outputs {
            match output {
                Output::Send(bytes) => {
                    unsent |= !matches!(timeout(ANSWER_WAIT, stream.write_all(&bytes)).await, Ok(Ok(())));
                }
                Output::Import(_) => {}
                // A reader that has no time for it has an order already: another such one, or a client.
                Output::Ask(index) => drop(senders[index].try_send(Order::Ask)),
                Output::Close(reason) => {
                    match reason {
                        CloseReason::Busy(_) => server.refusals.tell((), |end| {
                            tracing::warn!("USB/IP client refused: {reason}{end}");
                        }),
                        _ => tracing::debug!("USB/IP client: {reason}"),
                    }
                    closed = true;
                }
            }
        }
        if let Some(index) = chosen {
            let handed = !unsent && senders[index].send(Order::Imported(stream, early)).await.is_ok();
            if !handed {
                server.set_free(index);
            }
            return;
        }
        if unsent || closed {
            let _ = stream.shutdown().await;
            return;
        }
    }
}
