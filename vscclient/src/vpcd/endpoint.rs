//! Where vpcd is: `vpcd:[HOST[:PORT]][,slot=N]`.

use vscard_protocol::chardev::Endpoint;

/// How the endpoint's text begins.
pub(crate) const PREFIX: &str = "vpcd:";
/// Port of the first slot; each further one has the next.
const PORT: u16 = 35_963;

/// Reads `vpcd:[HOST[:PORT]][,slot=N]`.
pub(crate) fn endpoint(text: &str) -> Result<Endpoint, String> {
    let mut parts = text.strip_prefix(PREFIX).unwrap_or(text).split(',');
    let address = match parts.next().unwrap_or_default() {
        "" => format!("localhost:{PORT}"),
        // Without a port: a name, or an IPv6 address in brackets.
        host if !host.contains(':') || host.ends_with(']') => format!("{host}:{PORT}"),
        address => address.to_owned(),
    };
    let mut slot = None;
    for option in parts {
        let number = option.strip_prefix("slot=").filter(|number| !number.starts_with('+'));
        let number = number.and_then(|number| number.parse::<u16>().ok());
        let number = number.ok_or_else(|| format!("{text}: {option:?} is not slot=N, with N from 0"))?;
        if slot.replace(number).is_some() {
            return Err(format!("{text}: slot is given twice"));
        }
    }
    let slot = slot.unwrap_or(0);
    let first = format!("tcp:{address}").parse().map_err(|error| format!("{text}: {error}"))?;
    match first {
        Endpoint::Tcp { host, port } => match port.checked_add(slot) {
            Some(port) => Ok(Endpoint::Tcp { host, port }),
            None => Err(format!("{text}: slot {slot} has no port, {port} + {slot} is more than 65535")),
        },
        _ => Err(format!("{text}: no TCP address")),
    }
}
