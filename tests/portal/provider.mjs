// A real OpenID provider (npm oidc-provider) for the test of the page: node provider.mjs PORT PAGE
import { Provider } from "oidc-provider";

const [port, page] = process.argv.slice(2);
const provider = new Provider(`http://127.0.0.1:${port}`, {
  clients: [{
    client_id: "upperdeck",
    client_secret: "a-secret-of-the-client",
    redirect_uris: [page],
    post_logout_redirect_uris: [page],
    grant_types: ["authorization_code"],
    response_types: ["code"],
  }],
  // Whoever signs in is the user of that name, in two groups.
  findAccount: (_, id) => ({
    accountId: id,
    claims: () => ({ sub: id, preferred_username: id, groups: ["staff", "gpu users"] }),
  }),
  claims: { openid: ["sub"], profile: ["preferred_username"], groups: ["groups"] },
  scopes: ["openid", "profile", "groups"],
  pkce: { required: () => true },
  cookies: { keys: ["a key of the test"] },
  features: { devInteractions: { enabled: true } },
});
provider.listen(Number(port), "127.0.0.1", () => console.log("ready"));
