// The page of the API's description: Swagger UI, which reads it and sends examples with the tab's key where one is needed.

/* global SwaggerUIBundle */
import { address, get, readKey } from "./api.js";

const place = document.getElementById("ui");

try {
  const spec = await get("openapi.json"); // asks for the key until one is right
  spec.servers = [{ url: address("").replace(/\/$/, "") }];
  const ui = SwaggerUIBundle({
    spec, domNode: place, deepLinking: true, docExpansion: "list",
    onComplete: () => readKey() && ui.preauthorizeApiKey("key", readKey()),
  });
} catch (problem) {
  place.textContent = problem.message;
  place.className = "problem";
}
